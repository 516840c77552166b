"""Labels of some slices on the image's own grid, as nnU-Net exports whole volumes."""

from typing import Any

import numpy as np
from torch import Tensor


def write_labels(
    labels: np.ndarray, logits: Tensor, first: int, *, properties: dict[str, Any], predictor: Any
) -> None:
    """Write slices into a label map, in place.

    The 2D configuration does not resample axis 0 of the network's array, so that each slice is
    exported alone: the result is that of nnU-Net's export of the whole.

    Parameters
    ----------
    labels : ndarray, integer
        In the shape of the image that was preprocessed; changed.
    logits : Tensor, shape (K, n, H, W), half precision
        Of neighbouring slices of the network's array. In the precision of nnU-Net's export, which
        resampling keeps: another one would decide otherwise where two classes are as likely.
    first : int
        Index of the first of them.
    properties : dict
        As nnU-Net's preprocessor left them.
    predictor : nnUNetPredictor
        For its managers.
    """
    configuration = predictor.configuration_manager
    forward = predictor.plans_manager.transpose_forward
    spacing = [properties["spacing"][axis] for axis in forward]
    shape = properties["shape_after_cropping_and_before_resampling"]
    resampled = configuration.resampling_fn_probabilities(
        logits,
        (logits.shape[1], *shape[1:]),
        [spacing[0], *configuration.spacing],
        spacing,
    )
    found = np.asarray(predictor.label_manager.convert_logits_to_segmentation(resampled))
    (low, _), *plane = properties["bbox_used_for_cropping"]
    start = low + first
    where = (slice(start, start + len(found)), *(slice(*side) for side in plane))
    labels.transpose(forward)[where] = found
