"""The cases of the images folder, and where the results of one go. No path leaves its folder."""

from dataclasses import dataclass
from pathlib import Path

from nnmosaic.data_conversion.dataset_json import DatasetJson
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import Case, find_image_cases
from nnmosaic.pipeline.serve.errors import RefusedError

PROMPTS_FOLDER = "prompts"
"""In the output folder: CASE.json, as ``nnmosaic predict --prompts`` reads them."""


@dataclass(frozen=True)
class Workspace:
    """What a server may read and write.

    Attributes
    ----------
    images, output : Path
        Without symbolic links.
    dataset : DatasetJson
        Of the model: file ending and channels.
    """

    images: Path
    output: Path
    dataset: DatasetJson

    @classmethod
    def of(cls, images: Path, output: Path, dataset: DatasetJson) -> "Workspace":
        """Return the workspace, with the folder for results made.

        Raises
        ------
        InputError
            If there are no images, or the folder for results cannot be one.
        """
        workspace = cls(images.resolve(), output.resolve(), dataset)
        workspace.cases()
        if workspace.output == workspace.images:
            raise InputError(f"{output} holds the images. Give another folder for results with -o.")
        try:
            workspace.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{output} cannot be made ({error}). Choose another with -o."
            ) from None
        return workspace

    def cases(self) -> tuple[dict[str, Case], dict[str, str]]:
        """Return the cases by name, and name -> what is wrong with the others.

        Raises
        ------
        InputError
            If the folder is missing or holds no image.
        """
        found, faults = find_image_cases(
            self.images,
            file_ending=self.dataset.file_ending,
            num_channels=len(self.dataset.channel_names),
        )
        cases = {}
        for case in found:
            outside = [p for p in case.images if not p.resolve().is_relative_to(self.images)]
            if outside:
                faults[case.identifier] = (
                    f"{outside[0]} is a link to a file outside {self.images}, which is not "
                    "followed. Copy the file, or start nnmosaic serve on the folder it lies in."
                )
            else:
                cases[case.identifier] = case
        return cases, faults

    def case(self, name: str) -> Case:
        """Return one case.

        Raises
        ------
        RefusedError
            If no case of the images folder has this name, or it cannot be used.
        """
        try:
            cases, faults = self.cases()
        except InputError as error:
            raise RefusedError(str(error), status=404, reason="case") from None
        if name in faults:
            raise RefusedError(faults[name], status=403, reason="case")
        if name not in cases:
            raise RefusedError(
                f"There is no case {name!r} in the images folder. Choose one from the list.",
                status=404,
                reason="case",
            )
        return cases[name]

    def label_map_file(self, name: str) -> Path:
        """Return where the label map of a case goes."""
        return self._result(self.output / f"{name}{self.dataset.file_ending}")

    def prompts_file(self, name: str) -> Path:
        """Return where the clicks and scribbles of a case go."""
        return self._result(self.output / PROMPTS_FOLDER / f"{name}.json")

    def is_saved(self, name: str) -> bool:
        """Return whether a label map of this case is in the output folder."""
        return (self.output / f"{name}{self.dataset.file_ending}").is_file()

    def _result(self, path: Path) -> Path:
        if path.is_symlink() or not path.resolve().is_relative_to(self.output):
            raise RefusedError(
                f"{path} is a link, which is not followed. Remove it and save again; nothing is "
                "lost.",
                status=403,
                reason="link",
            )
        return path
