"""Datasets with several raters for the benchmarks: photographs, and simulated raters in 3D."""

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.grid import command, link, preprocess_with_one_plan
from benchmarks.raw_data import kept_aside, subjects_of
from nnmosaic.data_conversion.atomic_write import read_json, write_json

PATCH, STAGES = 256, 7
"""Of a 2D plan. The planner's own covers an image at once, and a step takes four times as long."""
PHOTO_FOLDS = 3
SHIFT = 2
"""Voxels by which one of the simulated raters moves the border between two classes."""
TIE = "background"
"""The rule of ``add_raters`` unless told. Ties to the first of two raters would make this rater's
masks the fused reference."""
TIE_FILE = "tie.json"


@dataclass(frozen=True)
class Photographs:
    """Images and masks of one structure as PNG; cross-validation by person.

    Attributes
    ----------
    folder : str
        In the shared data.
    raters : mapping of str to str
        Rater -> pattern with {stem} for its files, below the folder.
    foreground_is_zero : bool
        Whether the structure is 0 in the files.
    single : bool
        Whether an image shows one object: then all rows keep the largest component of their masks,
        as nnU-Net's postprocessing does.
    """

    folder: str
    labels: tuple[str, ...]
    channels: tuple[str, ...]
    raters: Mapping[str, str]
    foreground_is_zero: bool = False
    single: bool = False
    configuration = "2d"
    file_ending = ".png"

    def write(self, data: Path, target: Path) -> dict[str, str]:
        """Write images and masks at half the resolution, and return case -> person."""
        from skimage import io
        from skimage.measure import block_reduce

        source = data / self.folder
        named = subjects_of(source)
        people = {}
        for path in sorted((source / "images").iterdir()):
            image = io.imread(path).astype(float)
            if len(self.channels) == 1 and image.ndim == 3:
                image = image[..., :3].mean(2)
            blocks = (2, 2, *(1,) * (image.ndim - 2))
            save_png(block_reduce(image, blocks, np.mean).round(),
                     target / "images", f"{path.stem}_0000")  # fmt: skip
            for rater, pattern in self.raters.items():
                (file,) = source.glob(pattern.format(stem=path.stem))
                drawn = io.imread(file)
                drawn = drawn[..., 0] if drawn.ndim == 3 else drawn
                mask = (drawn == 0) if self.foreground_is_zero else (drawn > 0)
                half = block_reduce(mask.astype(float), (2, 2), np.mean) >= 0.5
                save_png(half, target / rater, path.stem)
            person = named[path.stem]
            people[path.stem] = path.stem if person == "unknown" else person
        return people

    def folds(self, data: Path, people: Mapping[str, str]) -> list[dict[str, list[str]]]:
        """Return nnU-Net's splits."""
        groups = sorted(set(people.values()))
        held_out = [set(groups[fold::PHOTO_FOLDS]) for fold in range(PHOTO_FOLDS)]
        return [_split(people, aside) for aside in held_out]


@dataclass(frozen=True)
class SimulatedRaters:
    """The hippocampus as three people might draw it; some did not see every training case.

    Attributes
    ----------
    missing : float
        Share of the annotations of training subjects that is left out. What is left out at one
        share is left out at a higher one, too; a case without any is no case.
    """

    missing: float
    folder = "msd_task04_hippocampus"
    labels = ("anterior", "posterior")
    channels = ("MRI",)
    raters = ("careful", "narrow", "wide")
    configuration = "3d_fullres"
    file_ending = ".nii.gz"

    def write(self, data: Path, target: Path) -> dict[str, str]:
        """Write images and label maps, and return case -> subject."""
        import SimpleITK

        source = data / self.folder
        people, aside = subjects_of(source), kept_aside(source, every=4)
        rng = np.random.default_rng(0)
        kept = {}
        for case, person in people.items():
            draws = rng.random(len(self.raters))
            there = [person in aside or draw >= self.missing for draw in draws]
            if not any(there):
                continue
            kept[case] = person
            image = source / "imagesTr" / f"{case}.nii.gz"
            link(image, target / "images" / f"{case}_0000.nii.gz")
            labels = SimpleITK.ReadImage(str(source / "labelsTr" / f"{case}.nii.gz"))
            maps = simulated_raters(SimpleITK.GetArrayFromImage(labels))
            for rater in np.array(self.raters)[there]:
                drawn = SimpleITK.GetImageFromArray(maps[rater])
                drawn.CopyInformation(labels)
                (target / rater).mkdir(parents=True, exist_ok=True)
                SimpleITK.WriteImage(drawn, str(target / rater / f"{case}.nii.gz"))
        return kept

    def folds(self, data: Path, people: Mapping[str, str]) -> list[dict[str, list[str]]]:
        """Return one split: every fourth subject is for validation, and has all raters."""
        return [_split(people, kept_aside(data / self.folder, every=4))]


def simulated_raters(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return rater -> label map: as it is; a voxel smaller; a voxel larger, with more of class 1.

    Parameters
    ----------
    labels : ndarray of int, shape (z, y, x)
        Background, 1 and 2. The third rater counts what is within `SHIFT` voxels of class 1 to it.
    """
    from scipy.ndimage import binary_dilation, binary_erosion, distance_transform_edt

    whole = labels > 0
    nearest = distance_transform_edt(~whole, return_distances=False, return_indices=True)
    wide = np.where(binary_dilation(whole), labels[tuple(nearest)], 0)
    wide[(wide == 2) & (distance_transform_edt(wide != 1) <= SHIFT)] = 1
    return {"careful": labels, "narrow": labels * binary_erosion(whole), "wide": wide}


def save_png(array: np.ndarray, folder: Path, stem: str) -> None:
    """Write an array as a PNG of 8 bits."""
    from skimage import io

    folder.mkdir(parents=True, exist_ok=True)
    io.imsave(folder / f"{stem}.png", array.astype(np.uint8), check_contrast=False)


def keep_largest(folder: Path) -> None:
    """Keep the largest component of each mask (PNG) below a folder."""
    from acvl_utils.morphology.morphology_helper import remove_all_but_largest_component
    from skimage import io

    for path in folder.rglob("*.png"):
        mask = io.imread(path) > 0
        save_png(remove_all_but_largest_component(mask), path.parent, path.stem)


def prepare(data: Path, work: Path, datasets: Mapping[str, Photographs | SimulatedRaters]) -> None:
    """Make raw datasets, preprocess them with the plan of the first, and write their folds.

    Parameters
    ----------
    datasets : mapping
        nnU-Net's name of the dataset -> where it is from.

    Raises
    ------
    RuntimeError
        If a dataset is there whose references are fused with another rule of ties.
    """
    for name in datasets:
        raw = work / "nnUNet_raw" / name
        if raw.is_dir() and tie_of(work, name) != TIE:
            raise RuntimeError(
                f"{raw} has references in which ties go to the first rater. Remove {work}, or "
                "choose another folder with --work."
            )
    preprocessed = work / "nnUNet_preprocessed"
    wanted = [preprocessed / name / "splits_final.json" for name in datasets]
    if all(path.is_file() for path in (*wanted, *(subjects_file(work, name) for name in datasets))):
        return
    people = {}
    for name, source in datasets.items():
        files = work / "files" / name
        shutil.rmtree(files, ignore_errors=True)
        people[name] = source.write(data, files)
        if not (work / "nnUNet_raw" / name).is_dir():
            raters = [f"{rater}={files / rater}" for rater in source.raters]
            number, short = name[len("Dataset") :].split("_")
            command(
                "add_raters", "-d", number, "-n", short, "--images", str(files / "images"),
                "--labels", *source.labels, "--channels", *source.channels,
                "--file_ending", source.file_ending, "--raters", *raters, "--tie", TIE,
            )  # fmt: skip
            write_json({"tie": TIE}, work / "nnUNet_raw" / name / TIE_FILE)
    configuration = next(iter(datasets.values())).configuration
    preprocess_with_one_plan(preprocessed, list(datasets), configuration)
    for name, source in datasets.items():
        if configuration == "2d":
            _make_patch_smaller(preprocessed / name / "nnUNetPlans.json")
        write_json(people[name], subjects_file(work, name))
        write_json(source.folds(data, people[name]), preprocessed / name / "splits_final.json")


def tie_of(work: Path, dataset: str) -> str:
    """Return which rule of ties the fused references of a raw dataset have."""
    path = work / "nnUNet_raw" / dataset / TIE_FILE
    return str(read_json(path)["tie"]) if path.is_file() else "first_rater"  # as it once was


def subjects_file(work: Path, dataset: str) -> Path:
    """Return where it is noted whose cases they are."""
    return work / "files" / dataset / "subjects.json"


def _split(people: Mapping[str, str], aside: Collection[str]) -> dict[str, list[str]]:
    return {
        "train": sorted(case for case, person in people.items() if person not in aside),
        "val": sorted(case for case, person in people.items() if person in aside),
    }


def _make_patch_smaller(path: Path) -> None:
    plans = read_json(path)
    configuration = plans["configurations"]["2d"]
    configuration["patch_size"] = [PATCH, PATCH]
    arguments = configuration["architecture"]["arch_kwargs"]
    arguments["n_stages"] = STAGES
    for key in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage"):
        arguments[key] = arguments[key][:STAGES]
    arguments["n_conv_per_stage_decoder"] = arguments["n_conv_per_stage_decoder"][: STAGES - 1]
    write_json(plans, path)
