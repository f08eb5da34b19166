"""Rectified flow (reflow, one-step distillation) on noise-image pairs.

One GPU (or a CPU):
    accelerate launch train/reflow.py \
        --config configs/methods/reflow.yaml configs/models/sd15.yaml \
        --pretrained_model_name_or_path DIR --data.pairs_dir PAIRS \
        --output_dir runs/reflow

Two processes on one machine without a GPU (gloo):
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 \
        train/reflow.py --config ...

Config files merge left to right, flags come last; --help lists every option.
"""

import sys

from stepdistill.trainers import ReflowTrainer, launch

if __name__ == "__main__":
    launch(sys.argv[1:], ReflowTrainer)
