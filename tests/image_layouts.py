"""Tiny data sets in the layouts of `load_ufgir_dataset`. No two images of a folder are equal."""

from PIL import Image


def save_image(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value % 256, 90, 30)).save(file)


def make_folder(root, splits=("train", "val", "test"), classes=("a", "b"), images=5):
    """Write split/class/0.png ...; an empty split name gives class/0.png. No two images are equal."""
    value = 0
    for split in splits:
        for name in classes:
            for index in range(images):
                save_image(root / split / name / f"{index}.png", value)
                value += 1
    return root


def make_csv(root, counts, classes=2, folder="images"):
    """Write CSV files and their images; `counts` are the images of each class in each file."""
    for stem, images in counts.items():
        lines = ["class_id,dir"]
        for class_id in range(classes):
            for index in range(images):
                save_image(root / folder / f"{stem}_{class_id}_{index}.png", 10 * class_id + index)
                lines.append(f"{class_id},{stem}_{class_id}_{index}.png")
        (root / f"{stem}.csv").write_text("\n".join(lines) + "\n")
    return root
