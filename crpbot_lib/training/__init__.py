"""Training: the job that the GPU instance runs, and what its orchestrator needs to describe and judge it.

Importing this package imports no torch.
"""

from crpbot_lib.training.config import FeatureFile, JobSpec, TrainConfig
from crpbot_lib.training.errors import PermanentTrainingError, TrainingError
from crpbot_lib.training.smoke import ModelLog, marked
from crpbot_lib.training.spec import accuracy_words, check_model, job_spec, read_status, write_job

__all__ = [
    "FeatureFile",
    "JobSpec",
    "ModelLog",
    "PermanentTrainingError",
    "TrainConfig",
    "TrainingError",
    "accuracy_words",
    "check_model",
    "job_spec",
    "marked",
    "read_status",
    "write_job",
]
