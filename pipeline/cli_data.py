"""Commands on raw datasets: merge, add_raters, hide_labels, sparsify, doctor."""

# ruff: noqa: T201 - what a command answers is printed.

import argparse
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.dataset_json import IDENTITIES
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.cli_arguments import (
    add_command,
    dataset_argument,
    dataset_id,
    positive,
    whole_number,
    workspace_argument,
)
from nnmosaic.pipeline.exit_codes import BAD_INPUT, DONE
from nnmosaic.pipeline.workspace import open_workspace


def add_merge(commands: Any) -> None:
    """Add ``merge``."""
    parser = add_command(
        commands, "merge", "several raw datasets with different labels into one", _do_merge
    )
    workspace_argument(parser)
    parser.add_argument(
        "-d", type=dataset_id, required=True, metavar="ID", help="id of the new dataset"
    )
    parser.add_argument("-n", required=True, metavar="NAME", help="name of the new dataset")
    parser.add_argument(
        "--sources", nargs="+", required=True, metavar="ID", help="datasets to merge"
    )
    parser.add_argument(
        "--rename",
        nargs="+",
        default=[],
        metavar="SOURCE:LABEL=CLASS[+CLASS]",
        help="what a source's label is called in the merged dataset; several classes: their union",
    )
    parser.add_argument(
        "--copy", action="store_true", help="copy the images instead of linking to them"
    )


def _do_merge(options: argparse.Namespace) -> None:
    from nnmosaic.pipeline.merge import merge

    print(
        merge(
            open_workspace(options.workspace),
            options.d,
            options.n,
            options.sources,
            renames=options.rename,
            copy_images=options.copy,
        )
    )


def add_add_raters(commands: Any) -> None:
    """Add ``add_raters``."""
    parser = add_command(
        commands, "add_raters", "one dataset with several annotations per case", _do_add_raters
    )
    workspace_argument(parser)
    parser.add_argument(
        "-d", type=dataset_id, required=True, metavar="ID", help="id of the new dataset"
    )
    parser.add_argument("-n", required=True, metavar="NAME", help="name of the new dataset")
    parser.add_argument(
        "--images", type=Path, required=True, metavar="FOLDER", help="images, CASE_XXXX"
    )
    parser.add_argument(
        "--raters",
        nargs="+",
        required=True,
        metavar="RATER=FOLDER",
        help="label maps, CASE; a missing file: this rater has not annotated the case",
    )
    parser.add_argument(
        "--labels", nargs="+", required=True, metavar="CLASS", help="names of the labels 1, 2, ..."
    )
    parser.add_argument(
        "--channels", nargs="+", default=["image"], metavar="NAME", help="default: image"
    )
    parser.add_argument(
        "--file_ending", default=".nii.gz", metavar="ENDING", help="default: %(default)s"
    )
    parser.add_argument(
        "--fusion",
        choices=("majority", "staple"),
        default="majority",
        help="the reference that nnU-Net reads; majority is also what the soft mean of the masks "
        "gives, the most probable class (default: %(default)s)",
    )
    parser.add_argument(
        "--tie",
        choices=("background", "foreground", "first_rater"),
        help="of --fusion majority, where raters differ by halves (default: background)",
    )
    parser.add_argument(
        "--identity",
        choices=IDENTITIES,
        help=f"whether a rater is the same person in all cases (default: {IDENTITIES[0]})",
    )
    parser.add_argument(
        "--order",
        choices=("as_is", "area"),
        default="as_is",
        help="area: sort the label maps of each case by size into rank1, rank2, ...; --identity is "
        f"then {IDENTITIES[1]} (default: %(default)s)",
    )
    parser.add_argument(
        "--subjects", type=Path, metavar="FILE", help="CSV with the columns case and subject"
    )
    parser.add_argument(
        "--copy", action="store_true", help="copy the files instead of linking to them"
    )


def _do_add_raters(options: argparse.Namespace) -> None:
    if options.tie is not None and options.fusion != "majority":
        raise InputError("--tie says something about --fusion majority only. Leave it out.")
    from nnmosaic.data_conversion.add_raters import RaterDataset
    from nnmosaic.pipeline.convert import add_raters

    what = RaterDataset(
        channels=options.channels,
        classes=options.labels,
        file_ending=options.file_ending,
        fusion=options.fusion,
        tie=options.tie or "background",
        identity=options.identity or ("exchangeable" if options.order == "area" else "persistent"),
        order=options.order,
    )
    print(
        add_raters(
            open_workspace(options.workspace),
            options.d,
            options.n,
            options.images,
            options.raters,
            what,
            subjects=options.subjects,
            copy_files=options.copy,
        )
    )


def add_hide_labels(commands: Any) -> None:
    """Add ``hide_labels``."""
    parser = add_command(
        commands, "hide_labels", "a dataset with some classes and cases of another", _do_hide_labels
    )
    _conversion_arguments(parser)
    parser.add_argument(
        "--keep",
        nargs="+",
        default=[],
        metavar="CLASS",
        help="default: all classes, or with --join only the joined ones",
    )
    parser.add_argument(
        "--join",
        nargs="+",
        default=[],
        metavar="NEWNAME=A+B",
        help="one label for the union of classes",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--part", metavar="K/N", help="the K-th of N parts of the subjects")
    chosen.add_argument("--cases", nargs="+", default=[], metavar="CASE", help="default: all")


def _do_hide_labels(options: argparse.Namespace) -> None:
    from nnmosaic.pipeline.convert import hide_labels

    print(
        hide_labels(
            open_workspace(options.workspace),
            options.d,
            options.output_id,
            options.n,
            keep=options.keep,
            joins=options.join,
            part=options.part,
            cases=options.cases,
            copy_files=options.copy,
        )
    )


def add_sparsify(commands: Any) -> None:
    """Add ``sparsify``."""
    parser = add_command(
        commands, "sparsify", "a dataset that is only annotated in places", _do_sparsify
    )
    _conversion_arguments(parser)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--planes", type=positive, metavar="K", help="every K-th plane")
    kind.add_argument(
        "--scribbles", action="store_true", help="a thin curve per class and plane, 2D"
    )
    kind.add_argument(
        "--cubes", type=positive, metavar="N", help="N cubes, half of them on foreground"
    )
    parser.add_argument(
        "--axes",
        nargs="+",
        type=int,
        choices=(0, 1, 2),
        metavar="AXIS",
        help="of --planes, as nnU-Net reads the array: 0 1 2 are z y x for NIfTI "
        "(default: the one with the largest spacing)",
    )
    parser.add_argument(
        "--size", type=positive, metavar="VOXELS", help="side of --cubes, which need it"
    )
    parser.add_argument("--seed", type=whole_number, metavar="N", help="of --cubes (default: 0)")


def _do_sparsify(options: argparse.Namespace) -> None:
    for flag, value, kind, wanted in (
        ("--axes", options.axes, "--planes", options.planes),
        ("--size", options.size, "--cubes", options.cubes),
        ("--seed", options.seed, "--cubes", options.cubes),
    ):
        if value is not None and wanted is None:
            raise InputError(f"{flag} says something about {kind} only. Leave it out.")
    if options.cubes is not None and options.size is None:
        raise InputError("--cubes needs the side of a cube in voxels, for example --size 16.")
    from nnmosaic.data_conversion.sparsify import Cubes, Planes, Scribbles
    from nnmosaic.pipeline.convert import sparsify

    annotation: Planes | Scribbles | Cubes = Scribbles()
    if options.planes is not None:
        annotation = Planes(options.planes, tuple(options.axes or ()))
    elif options.cubes is not None:
        annotation = Cubes(options.cubes, options.size, options.seed or 0)
    print(
        sparsify(
            open_workspace(options.workspace),
            options.d,
            options.output_id,
            options.n,
            annotation,
            copy_files=options.copy,
        )
    )


def _conversion_arguments(parser: argparse.ArgumentParser) -> None:
    workspace_argument(parser)
    dataset_argument(parser)
    parser.add_argument(
        "--output_id", type=dataset_id, required=True, metavar="ID", help="id of the new dataset"
    )
    parser.add_argument("-n", required=True, metavar="NAME", help="name of the new dataset")
    parser.add_argument(
        "--copy", action="store_true", help="copy the files instead of linking to them"
    )


def add_doctor(commands: Any) -> None:
    """Add ``doctor``."""
    parser = add_command(
        commands, "doctor", "check a raw dataset, with a cure for each finding", _do_doctor
    )
    workspace_argument(parser)
    dataset_argument(parser)


def _do_doctor(options: argparse.Namespace) -> int:
    from nnmosaic.data_conversion.doctor import examine

    workspace = open_workspace(options.workspace)
    folder = workspace.raw_dataset(options.d)
    findings = examine(
        folder, splits_file=workspace.preprocessed / folder.name / "splits_final.json"
    )
    for finding in sorted(findings, key=lambda f: not f.is_error):
        print(("ERROR    " if finding.is_error else "warning  ") + finding.text)
    errors = sum(finding.is_error for finding in findings)
    print(f"{folder.name}: {errors} errors, {len(findings) - errors} warnings")
    return BAD_INPUT if errors else DONE


DATA_COMMANDS = (add_merge, add_add_raters, add_hide_labels, add_sparsify, add_doctor)
