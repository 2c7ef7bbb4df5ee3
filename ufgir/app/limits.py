"""Limits of the web page: sizes of images and models, waiting times, and memory.

A page can be public (`ufgir app --host 0.0.0.0`, a Space), and runs on the CPU of one machine. docs/app.md lists the limits that
affect visitors.
"""

# Images that are uploaded or found in --examples

MAX_UPLOAD = "50mb"  # size of a file, in Gradio's format; photos are smaller
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
)  # Pillow would open others, such as EPS, with external programs
MOST_PIXELS = 120_000_000  # pixels of an image; larger ones are not decoded, to protect the memory
LONGEST_SIDE = 1024  # pixels of the longer side of a stored image, more than any model uses
MOST_ELONGATED = (
    20  # ratio of the sides of an image; others could be resized to millions of pixels by their shorter side
)
FOLDER_EXAMPLES = 12  # images of --examples that are shown: two rows of thumbnails
DRAWN_EXAMPLES = 8  # leaves of a model's data set that are shown, one per class
SMALLEST_DRAWN = 16  # pixels, smallest side of a drawn leaf

# Models that visitors name; those of the owner may be larger

MOST_PARAMETERS = 400_000_000  # a ViT-L/16 has 304 million
MOST_LAYERS = 100  # a ViT-g has 40; building modules takes time before parameters can be counted
MOST_PATCHES = 4096  # an image of 1024 x 1024 pixels in patches of 16; attention scales with their square
MOST_CLASSES = 50_000  # ImageNet-21k has 21,841
MOST_INPUT_PIXELS = 8_000_000  # of a model's input, or before the center crop; 1024 x 1024 is one million
MOST_TEXT_BYTES = 20_000_000  # size of config.json; the names of 50,000 classes, twice, need about 5 MB
BYTES_PER_PARAMETER = 4.1  # size of a weights file: float32, and the names
TOO_LARGE = (
    f"The limits are {MOST_LAYERS} layers, {MOST_PATCHES} patches, {MOST_CLASSES:,} classes, "
    f"{MOST_INPUT_PIXELS // 10**6} million pixels and {MOST_PARAMETERS // 10**6} million parameters."
)

# Temporary files

UPLOAD_SECONDS = 3200  # age at which an unread upload is deleted; others are deleted as soon as they are read
SWEEP_SECONDS = 300  # interval of the search for such uploads, so that all are deleted within an hour

# Computation

AT_ONCE = 1  # simultaneous computations; a model uses all cores, and parallel ones would disturb the latency
MOST_WAITING = 64  # requests in the queue; further ones are rejected
SMALLEST_KEEP_RATE = 0.01  # lower end of the slider
QUICK = 1.0  # seconds of a forward pass; slower models are timed only when the button is pressed
MOST_ROUNDS = 7  # runs for the median of the latency
FEWEST_ROUNDS = 3  # the same for a slow model
TIMING_SECONDS = 3.0  # seconds after which no run starts, if there are FEWEST_ROUNDS

# Display

TOP_CLASSES = 5  # classes with their probability
PICTURE_SIDE = 480  # pixels of the longer side of a picture
THUMBNAIL_SIDE = 128  # pixels of the longer side of a thumbnail, twice the size on screen
PICTURE_QUALITY = 85  # quality of WebP in percent, without visible artifacts, at about 20 kB per picture

# Cached objects

CHECKPOINTS = 2  # models with their own weights: the current and the previous one
SETTINGS = 8  # models of other settings, which share those weights
PREDICTIONS = 16  # predictions, by image and setting
DRAWINGS = 16  # groups of pictures, by image and setting
COSTS = 64  # multiply-adds, by setting
LATENCIES = 32  # measurements; all are dropped when there are more
SESSIONS = 200  # visitors whose image and controls are stored
