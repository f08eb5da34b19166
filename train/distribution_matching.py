"""Distribution matching distillation (DMD2, f-distill).

One GPU (or a CPU):
    accelerate launch train/distribution_matching.py \
        --config configs/methods/dmd2.yaml configs/models/sd15.yaml \
        --pretrained_model_name_or_path DIR --data.prompts_file prompts.txt \
        --output_dir runs/distribution_matching

Two processes on one machine without a GPU (gloo):
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 \
        train/distribution_matching.py --config ...

Config files merge left to right, flags come last; --help lists every option.
"""

import sys

from stepdistill.trainers import DistributionMatchingTrainer, launch

if __name__ == "__main__":
    launch(sys.argv[1:], DistributionMatchingTrainer)
