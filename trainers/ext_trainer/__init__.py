"""The folder for ``nnUNet_extTrainer``: nnU-Net imports every module in it."""
