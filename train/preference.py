"""Preference tuning of a model that is distilled already (PSO, offline), at its own few steps.

One GPU (or a CPU), people's choices as JSON lines of text, chosen and rejected:
    accelerate launch train/preference.py \
        --config configs/methods/preference.yaml --pretrained_model_name_or_path SDXL_TURBO \
        --data.preferences_file pairs.jsonl --output_dir runs/preference

Pick-a-Pic's columns, a model that takes one step:
    accelerate launch train/preference.py \
        --config configs/methods/preference.yaml --pretrained_model_name_or_path DIR \
        --method_config.num_steps 1 --data.dataset_name PICKS --output_dir runs/picks

Config files merge left to right, flags come last; --help lists every option.
"""

import sys

from stepdistill.trainers import PreferenceTrainer, launch

if __name__ == "__main__":
    launch(sys.argv[1:], PreferenceTrainer)
