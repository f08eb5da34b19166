"""Preferences: people's choices (PSO) or rewards (online PSO, feedback), for a distilled model.

One GPU (or a CPU), people's choices as JSON lines of text, chosen and rejected:
    accelerate launch train/preference.py \
        --config configs/methods/preference.yaml --pretrained_model_name_or_path SDXL_TURBO \
        --data.preferences_file pairs.jsonl --output_dir runs/preference

Pick-a-Pic's columns, a model that takes one step:
    accelerate launch train/preference.py \
        --config configs/methods/preference.yaml --pretrained_model_name_or_path DIR \
        --method_config.num_steps 1 --data.dataset_name PICKS --output_dir runs/picks

A model's own samples, ranked by PickScore:
    accelerate launch train/preference.py \
        --config configs/methods/online_preference.yaml \
        --pretrained_model_name_or_path SDXL_TURBO --data.prompts_file prompts.txt \
        --output_dir runs/online

Rewards beside an anchor, on the student of another run:
    accelerate launch train/preference.py \
        --config configs/methods/feedback.yaml configs/models/sd15.yaml \
        --pretrained_model_name_or_path DIR --init_student_from runs/dmd2 \
        --data.prompts_file prompts.txt --output_dir runs/feedback

Two processes on one machine without a GPU (gloo):
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 \
        train/preference.py --config ...

Config files merge left to right, flags come last; --help lists every option.
"""

import sys

from stepdistill.trainers import PreferenceTrainer, launch

if __name__ == "__main__":
    launch(sys.argv[1:], PreferenceTrainer)
