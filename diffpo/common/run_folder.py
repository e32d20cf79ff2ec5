"""What the files in a run's folder are called."""

CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.jsonl"
CHECKPOINT = "checkpoint-"  # before the number of the step
SAMPLES = "samples"  # folder of the pictures that were sampled while training
TRACKED = "trackers.json"  # what trackers call the run, to go on with it
BEST = "best"  # folder with what is trained as it was at the best look
BETA = "beta.json"  # what `objective.beta: auto` found
BETAS = "beta"  # folder of its trials
