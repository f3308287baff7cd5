"""Makes a trained LLaVA of 157 M parameters in llava-hf's layout, from two pinned wheels and the projector beside this file.

    python -m tools.smol.make_smol_llava --out build/smol

The same bytes each time. Nothing but the wheels is downloaded; they stay in build/wheels.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file

from tools.smol.parts import decoder, wheels
from tools.smol.parts.model import PROJECTOR_FILE, make_model, make_processor


def make(out: Path, wheels_folder: Path, projector: Path = PROJECTOR_FILE) -> None:
    """Writes the checkpoint in float16 into the folder `out`, which appears only when it is whole."""
    tokenizer = decoder.make_tokenizer(decoder.open_gguf(wheels_folder))
    model = make_model(wheels_folder, tokenizer)
    model.model.multi_modal_projector.load_state_dict(load_file(projector))
    unfinished = out.with_name(f"{out.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.half().save_pretrained(unfinished)
    make_processor(tokenizer).save_pretrained(unfinished)
    shutil.rmtree(out, ignore_errors=True)
    unfinished.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheels", type=Path, default=wheels.FOLDER, help="folder of the pinned wheels")
    parser.add_argument("--projector", type=Path, default=PROJECTOR_FILE, help="safetensors file of train_projector")
    args = parser.parse_args()
    make(args.out, args.wheels, args.projector)
    print(f"{args.out}: LLaVA with SmolLM2-135M-Instruct and a ViT-S/14")


if __name__ == "__main__":
    main()
