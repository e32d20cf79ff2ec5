"""What the files in a run's folder are called."""

CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.jsonl"
CHECKPOINT = "checkpoint-"  # before the number of the step
