"""Super-resolution in one step, distilled from one factor to the next (scale_distill, YONOS-SR).

From the stock x4 upscaler to x8, of a folder of pictures:
    accelerate launch train/super_resolution.py \
        --config configs/methods/scale_distill.yaml \
        --pretrained_model_name_or_path UPSCALER --data.train_data_dir IMAGES \
        --data.degradation.factor 8 --output_dir runs/x8

Its export as the next one's teacher, to x16, of pictures degraded as cameras do:
    accelerate launch train/super_resolution.py \
        --config configs/methods/scale_distill.yaml \
        --pretrained_model_name_or_path runs/x8/pipeline --data.train_data_dir IMAGES \
        --data.degradation.factor 16 --data.degradation.kind real_esrgan --output_dir runs/x16

The first of a chain, on the pictures themselves:
    accelerate launch train/super_resolution.py \
        --config configs/methods/scale_distill.yaml --method_config.target images \
        --pretrained_model_name_or_path DIR --data.train_data_dir IMAGES \
        --data.degradation.factor 2 --output_dir runs/x2

Config files merge left to right, flags come last; --help lists every option.
"""

import sys

from stepdistill.trainers import SuperResolutionTrainer, launch

if __name__ == "__main__":
    launch(sys.argv[1:], SuperResolutionTrainer)
