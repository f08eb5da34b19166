"""LoRA guidance distillation, with optional progressive halving of the steps.

One GPU (or a CPU):
    accelerate launch train/lora_distillation.py \
        --config configs/methods/lora_guidance.yaml configs/models/sd15.yaml \
        --pretrained_model_name_or_path DIR --data.train_data_dir IMAGES \
        --output_dir runs/lora_guidance

Two processes on one machine without a GPU (gloo):
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 \
        train/lora_distillation.py --config ...

Config files merge left to right, flags come last; --help lists every option.
"""

import sys

from stepdistill.trainers import LoRADistillationTrainer, launch

if __name__ == "__main__":
    launch(sys.argv[1:], LoRADistillationTrainer)
