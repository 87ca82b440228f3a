# SPDX-License-Identifier: Apache-2.0
"""Every key that the trainer reads, with its default; `file.py:a=1,b` parsing.

A recipe starts from `defaults()` and fills `model_name`, `model` and `data`;
the keys inside these two belong to the model and to the data source.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
  """Arguments of `--config=file.py:variant=3b,test`.

  Args:
    arg: what follows the colon. A name alone means True.
    **defaults: the names allowed and their defaults, whose type is kept.
  """
  values = dict(defaults)
  for part in filter(None, (arg or "").split(",")):
    name, given, text = part.partition("=")
    if name not in defaults:
      raise ValueError(
        f"config argument {name!r} is unknown; known are "
        + ", ".join(f"{k}={v!r}" for k, v in defaults.items())
      )
    kind = type(defaults[name])
    if kind is bool:
      if text.lower() not in ("", "0", "1", "true", "false"):
        raise ValueError(
          f"config argument {name}={text!r}: expected true or false"
        )
      values[name] = text.lower() not in ("0", "false")
      continue
    if not given:
      raise ValueError(f"config argument {name} needs a value: {name}=...")
    try:
      values[name] = kind(text)
    except ValueError:
      raise ValueError(
        f"config argument {name}={text!r}: expected {kind.__name__}"
      ) from None
  return ConfigDict(values)


def defaults() -> ConfigDict:
  """Defaults of the trainer."""
  config = ConfigDict()
  config.seed = 0
  config.steps = 1000
  config.batch_size = 8  # over all hosts
  config.accumulate = 1  # micro-batches of one update
  # Where to start when the workdir has no checkpoint: another workdir, or a
  # Hugging Face folder; "" is a fresh start. `init_new` lists regexes of the
  # parameters that the source lacks and that start fresh.
  config.init_from = ""
  config.init_new = ()
  # Part of the model -> weights that are published on their own; "" is none.
  config.init_parts = ConfigDict()

  # `source` is a module with make(config, split).
  config.data = ConfigDict(
    {
      "source": "",
      "split": "train",
      "seed": 0,
      "shuffle": True,
      "threads": 2,
      "workers": 0,  # processes instead of threads
      "prefetch": 4,  # batches made ahead of the device
    }
  )
  config.model_name = ""
  config.model = ConfigDict({"variant": ""})

  # (layers, gain): the key projection starts as gain times the query's.
  config.init = ConfigDict({"match_query_key": ()})

  # Low-rank adapters: ordered (regex over a linear layer's name, rank), first
  # match wins, rank 0 is none; () is off. See spatial_jax/lora.py.
  config.lora = ConfigDict(
    {
      "ranks": (),
      "scale": 2.0,  # alpha / rank
      "start": "kaiming",  # or "gaussian"
      "dropout": 0.0,
    }
  )

  # Choices by parameter are ordered (regex, value) lists, first match wins.
  config.optimizer = ConfigDict(
    {
      "name": "adamw",  # or "muon"
      "lr": 1e-3,
      "b1": 0.9,
      "b2": 0.95,
      "eps": 1e-8,
      "weight_decay": 0.0,
      "decay": ((".*/kernel", True), (".*", False)),
      "clip": 1.0,  # global norm of the gradient; 0.0 is off
      "lr_mult": ((".*", 1.0),),
      "freeze": ((".*", False),),
      # Parameters in bfloat16; float32 copies of the trained ones are part of
      # the optimizer's state.
      "master": False,
      # Fractions of config.steps: warm-up, then the peak until `constant`,
      # then decay to `final` times the peak at the last step.
      "schedule": {
        "warmup": 0.03,
        "constant": 0.0,
        "decay": "cosine",  # or "linear", "none"
        "final": 0.0,
      },
      # Used when name is "muon": which matrices it updates; the others get
      # Adam at `adam_lr` times the learning rate.
      "muon": {
        "matrices": ((r"(.*/)?blocks/.*kernel", True), (".*", False)),
        "momentum": 0.95,
        "iterations": 5,
        "adam_lr": 0.15,
      },
    }
  )

  # Sizes multiply to the device count; -1 takes what the others leave.
  # `slices` are what the data-centre network joins; they divide `data`. 0: as
  # many as there are.
  config.mesh = ConfigDict(
    {"data": 1, "fsdp": -1, "tensor": 1, "context": 1, "slices": 0}
  )

  # Folder or bucket of compiled programs; "": $JAX_COMPILATION_CACHE_DIR.
  config.compilation_cache = ""

  # label -> {name: module with evaluate(), every: steps between runs while
  # training (0: only by the evaluate command), ...its keyword arguments}
  config.evals = ConfigDict()

  # The generate command; temperature 0.0 takes the likeliest token.
  config.generate = ConfigDict(
    {
      "split": "test",
      "rows": 2,
      "max_new_tokens": 32,
      "temperature": 0.0,
      "top_p": 1.0,
    }
  )
  config.checkpoint = ConfigDict({"every": 500, "keep": 2})
  config.logging = ConfigDict({"every": 10, "tensorboard": True})
  return config
