"""Trajectory-segmented distillation (TSCD, TCD), phased consistency (PCM), trajectories (CTM).

One GPU (or a CPU):
    accelerate launch train/trajectory_segmented.py \
        --config configs/methods/tscd.yaml configs/models/sd15.yaml \
        --pretrained_model_name_or_path DIR --data.train_data_dir IMAGES \
        --output_dir runs/trajectory_segmented

One adapter for 1, 2, 4 and 8 steps:
    accelerate launch train/trajectory_segmented.py \
        --recipe sd15-tscd-one-lora --pretrained_model_name_or_path DIR \
        --data.train_data_dir IMAGES --output_dir runs/one_lora

CTM:
    accelerate launch train/trajectory_segmented.py \
        --config configs/methods/ctm.yaml configs/models/sd3.yaml \
        --pretrained_model_name_or_path DIR --data.train_data_dir IMAGES \
        --output_dir runs/ctm

Two processes on one machine without a GPU (gloo):
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 \
        train/trajectory_segmented.py --config ...

Config files merge left to right, flags come last; --help lists every option.
"""

import sys

from stepdistill.trainers import TrajectorySegmentedTrainer, launch

if __name__ == "__main__":
    launch(sys.argv[1:], TrajectorySegmentedTrainer)
