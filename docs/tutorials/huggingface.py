"""Fine-tune with Hugging Face.

You put weight norm on a causal language model of transformers, train it with the Trainer, save it,
and reload it with `from_pretrained`. Then you train an adapter and merge it, and repair a model
whose own `remove_weight_norm()` no longer works.
"""

# %%
import torch
import transformers
from peft import LoraConfig, get_peft_model

import wn_surgery as wn
from wn_surgery.callbacks.transformers import WeightNormCallback, WeightNormTrainer
from wn_surgery.huggingface import (
    merge_and_unload,
    patch_model,
    rules_for,
    save_pretrained,
    unpatch_model,
)

transformers.set_seed(0)

# %% [markdown]
# ## The rules
#
# The usual rules for a model type are there already. They are ordinary [rules](../rules.md), so
# you can write your own:

# %%
for rule in rules_for("llama"):
    print(rule.describe())

# %% [markdown]
# ## Train
#
# The model here is small and has random weights, so that this page runs in seconds. With your own,
# write `AutoModelForCausalLM.from_pretrained(...)`. The callback patches the model when the Trainer
# is created, before there is an optimizer. `WeightNormTrainer` is the Trainer without weight decay
# on g.

# %%
model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
)
sentence = "the quick brown fox jumps over the lazy dog"
tokens = torch.tensor([ord(letter) for letter in sentence])
data = [{"input_ids": tokens, "labels": tokens}] * 64

trainer = WeightNormTrainer(
    model=model,
    args=transformers.TrainingArguments(
        "runs",
        max_steps=24,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=8,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=data,
    callbacks=[WeightNormCallback(rules_for("llama"))],
)
trainer.remove_callback(transformers.PrinterCallback)
_ = trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print("the loss falls:", losses == sorted(losses, reverse=True))
print(sum(site.normed for site in wn.sites(model)), "weights are normed")

# %% [markdown]
# ## Save and reload
#
# `save_pretrained` writes g and v, and the rules go into `config.json`. `from_pretrained` builds
# the weight norm again, where `wn_surgery.huggingface` has been imported:

# %%
_ = model.eval()
model.save_pretrained("patched")
again = transformers.AutoModelForCausalLM.from_pretrained("patched")
prompt = tokens[None, :9]
with torch.no_grad():
    print("the same bits:", torch.equal(again(prompt).logits, model(prompt).logits))

# %% [markdown]
# For people without this library, save it plain. The folder is then an ordinary one:

# %%
save_pretrained(model, "plain", layout="plain")
plain = transformers.AutoModelForCausalLM.from_pretrained("plain")
print("normed:", sum(site.normed for site in wn.sites(plain)))
with torch.no_grad():
    print("the same bits:", torch.equal(plain(prompt).logits, model(prompt).logits))

# %% [markdown]
# ## An adapter
#
# LoRA trains on the patched model. Merge with this library's function: PEFT's own writes into a
# weight that is computed, and the merge is lost.

# %%
adapted = get_peft_model(again, LoraConfig(target_modules=["q_proj", "v_proj"]))
with torch.no_grad():
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.1)  # as if it had been trained
    expected = adapted(prompt).logits
    merged = merge_and_unload(adapted)
    torch.testing.assert_close(merged(prompt).logits, expected, rtol=1e-3, atol=1e-3)
print(
    type(merged).__name__, "holds the adapter:", sum(s.normed for s in wn.sites(merged)), "normed"
)

# %% [markdown]
# ## A model that cannot take its own weight norm off
#
# Many vocoders apply torch's parametrization and remove torch's older form, which raises.
# `unpatch_model` (or `wn.remove`) takes off both:

# %%
sizes = {"model_in_dim": 8, "upsample_initial_channel": 32}
vocoder = transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**sizes)).eval()
vocoder.apply_weight_norm()
try:
    vocoder.remove_weight_norm()
except ValueError as error:
    print(str(error).partition("(")[0])

spectrogram = torch.randn(5, 8)
with torch.no_grad():
    before = vocoder(spectrogram)
    print(len(unpatch_model(vocoder).changed), "weights are plain again")
    print("the same bits:", torch.equal(vocoder(spectrogram), before))

# %% [markdown]
# To put weight norm on a model that is there already, outside a Trainer, call `patch_model`:

# %%
report = patch_model(plain, [{"names": "**.{q,k,v,o}_proj"}])
print(report.changed[0], "and", len(report.changed) - 1, "more")

# %% [markdown]
# What else there is: [Hugging Face](../huggingface.md).
