"""One training loop for every mixer; checkpoints that resume exactly.

result = train(load_run_config("configs/tiny.yaml", ["data.train=corpus/"]))
model, tokenizer = load(result.run_dir)
"""

from attamba.train.checkpoint import load, save_checkpoint
from attamba.train.interrupt import TrainingInterrupted, TrainingPreempted
from attamba.train.loop import TrainingDiverged, TrainResult, train
from attamba.train.metrics import read_metrics
from attamba.train.optim import lr_at
from attamba.train.storage import CheckpointError, find_checkpoint, list_checkpoints

__all__ = [
    "CheckpointError",
    "TrainResult",
    "TrainingDiverged",
    "TrainingInterrupted",
    "TrainingPreempted",
    "find_checkpoint",
    "list_checkpoints",
    "load",
    "lr_at",
    "read_metrics",
    "save_checkpoint",
    "train",
]
