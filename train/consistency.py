"""Consistency in discrete time (CD, LCM, LCM-LoRA, ECT, SCott) and in continuous (MeanFlow, sCM,
rCM), and the trajectory bootstrapped from prompts alone (BOOT).

One GPU (or a CPU):
    accelerate launch train/consistency.py \
        --config configs/methods/lcm_lora.yaml configs/models/sd15.yaml \
        --pretrained_model_name_or_path DIR --data.train_data_dir IMAGES \
        --output_dir runs/consistency

MeanFlow:
    accelerate launch train/consistency.py \
        --config configs/methods/meanflow.yaml configs/models/sd3.yaml \
        --pretrained_model_name_or_path DIR --data.train_data_dir IMAGES \
        --output_dir runs/meanflow

BOOT:
    accelerate launch train/consistency.py \
        --config configs/methods/boot.yaml configs/models/sd15.yaml \
        --pretrained_model_name_or_path DIR --data.prompts_file prompts.txt \
        --output_dir runs/boot

Two processes on one machine without a GPU (gloo):
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 \
        train/consistency.py --config ...

Config files merge left to right, flags come last; --help lists every option.
"""

import sys

from stepdistill.trainers import ConsistencyTrainer, launch

if __name__ == "__main__":
    launch(sys.argv[1:], ConsistencyTrainer)
