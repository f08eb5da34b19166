"""Adversarial distillation: heads on the teacher's own features (LADD), or on a frozen pixel
network beside score distillation (ADD).

One GPU (or a CPU):
    accelerate launch train/adversarial.py \
        --config configs/methods/ladd.yaml configs/models/sd3.yaml \
        --pretrained_model_name_or_path DIR --data.train_data_dir IMAGES \
        --output_dir runs/ladd

ADD, whose network is a vision model (DINOv2) or made of your own images:
    accelerate launch train/adversarial.py \
        --config configs/methods/add.yaml configs/models/sd15.yaml \
        --pretrained_model_name_or_path DIR --data.train_data_dir IMAGES \
        --method_config.gan.pixels.network NETWORK --output_dir runs/add

Two processes on one machine without a GPU (gloo):
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 \
        train/adversarial.py --config ...

Config files merge left to right, flags come last; --help lists every option.
"""

import sys

from stepdistill.trainers import AdversarialTrainer, launch

if __name__ == "__main__":
    launch(sys.argv[1:], AdversarialTrainer)
