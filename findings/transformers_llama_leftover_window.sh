#!/usr/bin/env bash
# transformers 5.24.0, CPU: a Llama whose config.json still has `sliding_window` from a conversion (Mistral's key, which LlamaConfig
# does not declare and LlamaModel's forward never reads) is two models. Forward passes ignore the key, with and without a cache.
# generate() does not: its cache is made from the config, finds the key, and keeps only the last `sliding_window` - 1 keys, so from
# the first token behind the prompt on, old tokens are no longer seen. use_cache=False gives other tokens than the default.
# No error and no warning. Seen below: logits of the two configurations equal; greedy tokens of generate() differ with the cache and
# agree without it; cache layers are of the sliding kind.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "transformers==5.24.0"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = dict(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512
)


def make(**leftover):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, eos_token_id=None, **leftover)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


ids = torch.randint(0, 128, (1, 60), generator=torch.Generator().manual_seed(1))
plain, leftover = make(), make(sliding_window=24)
with torch.no_grad():
    assert torch.equal(plain(ids).logits, leftover(ids).logits), "the forward pass obeys the key now"
    answers = {
        (name, cached): model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=cached)[0, 60:].tolist()
        for name, model in (("plain", plain), ("leftover", leftover))
        for cached in (True, False)
    }
for key, tokens in answers.items():
    print(key, tokens)
assert answers["plain", True] == answers["plain", False] == answers["leftover", False]
assert answers["leftover", True] != answers["leftover", False], "generate no longer depends on the cache"
print("as described: generate() with its default cache is another model")
PYTHON
