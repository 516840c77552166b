"""Where the clicks and strokes of a case are on the display, so that the page can draw them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nnmosaic.pipeline.serve.geometry import LPS_TO_RAS, Grid


def marks(
    prompts: Mapping[str, Any], labels: Mapping[str, int], grid: Grid
) -> list[dict[str, Any]]:
    """Return the points and scribbles of a session's prompts.

    Parameters
    ----------
    prompts : mapping
        As in methods/clustering_propagation.md, 5.4: in the world, or in voxels of the file.
    labels : mapping
        Class -> value; a prompt may name either.

    Returns
    -------
    list of dict
        "label", "positive", "radius" (voxels; 0 for a point) and "points" (display x, y, z).
    """
    names = {value: name for name, value in labels.items()}
    found = []
    for entry in prompts["interactions"]:
        if entry["type"] not in ("point", "scribble"):
            continue
        written = [entry["coord"]] if entry["type"] == "point" else entry["coords"]
        points = grid.world_to_display(_world(np.array(written, float), prompts, grid))
        found.append(
            {
                "label": names.get(entry["label"], entry["label"]),
                "positive": entry.get("positive", True),
                "radius": entry["radius"] if entry["type"] == "scribble" else 0,
                "points": points.round(3).tolist(),
            }
        )
    return found


def _world(points: np.ndarray, prompts: Mapping[str, Any], grid: Grid) -> np.ndarray:
    """Return RAS millimetres, shape (N, 3), of coordinates as they stand in the file."""
    if prompts.get("order", "xyz") == "zyx":
        points = points[:, ::-1]
    if prompts["space"] == "voxel":
        return grid.array_to_world(grid.from_file(points))
    return points if prompts["convention"] == "RAS" else points @ LPS_TO_RAS[:3, :3]
