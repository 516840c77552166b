"""What is taken where a command names nothing else."""

DEFAULT_PLANS = "nnUNetPlans"
DEFAULT_TRAINER = "nnUNetTrainerSelfDisambiguation"
