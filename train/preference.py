"""Feedback: rewards beside an anchor, for a student that is distilled already.

One GPU (or a CPU), on the student of another run:
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
