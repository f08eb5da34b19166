"""Tune the decoder of a super-resolution student on what its own few steps make.

    stepdistill decoder --student runs/x8/pipeline --train_data_dir pictures --output_dir x8-sharp

The denoiser stays as it is; the export loads and runs as before, with another autoencoder.
"""

from __future__ import annotations

from stepdistill.config.decoder import DecoderOptions


class Options(DecoderOptions):
    """See DecoderOptions."""


def run(options: Options) -> None:
    from stepdistill.reporting.bars import bar
    from stepdistill.training.decoder import tune_decoder

    with bar(total=options.max_train_steps, desc="decoder", unit="step") as shown:

        def tell(step: int, logs: dict[str, float]) -> None:
            shown.update(step - shown.n)
            shown.set_postfix({k: f"{v:.3f}" for k, v in logs.items()}, refresh=False)

        folder = tune_decoder(options, tell)
    print(f"exported {folder}")
