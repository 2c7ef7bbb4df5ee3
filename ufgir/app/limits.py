"""The limits of the web page: what visitors may load, how long they wait, and what is kept in memory.

A page can be open to strangers (`ufgir app --host 0.0.0.0`, a Space), and runs on one machine's CPU. docs/app.md names the limits
that visitors meet.
"""

# Images that are uploaded, or found in --examples

MAX_UPLOAD = "50mb"  # size of a file, as Gradio reads it: a photo of a camera has less
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # EPS, for one, Pillow would hand to another program
MOST_PIXELS = 120_000_000  # of an image that is opened: larger ones, made to fill the memory, are not decoded
LONGEST_SIDE = 1024  # pixels of an image that is kept: more than any model sees
MOST_ELONGATED = (
    20  # times as long as wide: a narrower image would be resized to millions of pixels by its shorter side
)
FOLDER_EXAMPLES = 12  # images shown of --examples: two rows of thumbnails
DRAWN_EXAMPLES = 8  # leaves shown of a model's data set, one a class
SMALLEST_DRAWN = 16  # pixels: smaller leaves cannot be drawn

# Models that visitors name, who must not fill the machine; the owner's own may be larger

MOST_PARAMETERS = 400_000_000  # a ViT-L/16 has 304 million
MOST_LAYERS = 100  # a ViT-g has 40; making modules takes time before any parameter is counted
MOST_PATCHES = 4096  # an image of 1024 x 1024 pixels in patches of 16: attention grows with their square
MOST_CLASSES = 50_000  # ImageNet-21k has 21,841
MOST_INPUT_PIXELS = (
    8_000_000  # of an image as a model sees it, or as it is resized before cropping; 1024 x 1024 is one million
)
MOST_TEXT_BYTES = 20_000_000  # of config.json: the names of 50,000 classes, twice, have some 5 MB
BYTES_PER_PARAMETER = 4.1  # of a file of weights: float32, and the names
TOO_LARGE = (
    f"It takes models of {MOST_LAYERS} layers, {MOST_PATCHES} patches, {MOST_CLASSES:,} classes, "
    f"{MOST_INPUT_PIXELS // 10**6} million pixels and {MOST_PARAMETERS // 10**6} million parameters at most."
)

# What visitors leave behind

UPLOAD_SECONDS = 3200  # age at which an upload is deleted that was never read; those that are read are deleted at once
SWEEP_SECONDS = 300  # between two searches for such uploads: none is there after an hour

# What is computed, and what visitors wait for

AT_ONCE = 1  # computations: a model uses all cores, and latencies are measured
MOST_WAITING = 64  # requests in the queue: who comes later is told to come again
SMALLEST_KEEP_RATE = 0.01  # of the slider: one percent of the tokens
QUICK = 1.0  # seconds of a forward pass: a slower model is timed only when the button is pressed
MOST_ROUNDS = 7  # runs that a latency is the median of
FEWEST_ROUNDS = 3  # runs, even of a slow model
TIMING_SECONDS = 3.0  # seconds after which no run is begun once there are FEWEST_ROUNDS

# What is shown

TOP_CLASSES = 5  # classes with their probability
PICTURE_SIDE = 480  # pixels of the longer side of a picture
THUMBNAIL_SIDE = 128  # pixels of the longer side of an example's button, twice as many as are seen
PICTURE_QUALITY = 85  # of WebP, out of 100: no difference can be seen, and a picture has some 20 kB

# What is kept in memory

CHECKPOINTS = 2  # models with weights of their own: the one that is shown, and the one before
SETTINGS = 8  # models of other settings, which share those weights
PREDICTIONS = 16  # of an image under a setting
DRAWINGS = 16  # pictures of an image under a setting
COSTS = 64  # multiply-adds of a setting
LATENCIES = 32  # measurements; all are forgotten when there are more
SESSIONS = 200  # visitors whose image and controls are remembered
