"""Variational score distillation (VSD as in SwiftBrush, SNOOPI's random guidance), prompts only.

One GPU (or a CPU):
    accelerate launch train/variational_score.py \
        --config configs/methods/vsd.yaml configs/models/sd15.yaml \
        --pretrained_model_name_or_path DIR --data.prompts_file prompts.txt \
        --output_dir runs/variational_score

Two processes on one machine without a GPU (gloo):
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 \
        train/variational_score.py --config ...

Config files merge left to right, flags come last; --help lists every option.
"""

import sys

from stepdistill.trainers import VariationalScoreTrainer, launch

if __name__ == "__main__":
    launch(sys.argv[1:], VariationalScoreTrainer)
