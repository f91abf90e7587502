"""States and pickles of `FastReplayBuffer` as releases made them that knew fewer entries."""

from typing import Any

from .torchrl_entries import Key, text
from .torchrl_layout import DONE, TERMINATED, TRUNCATED

_OWN = ("batch_size", "priority_key", "device", "pixels_dtype")


def as_present_state(state: dict[str, Any], frame_stack: int) -> dict[str, Any]:
    """With the settings and the layout that the state implies. A state without images does not tell its
    frame stack: then it is `frame_stack`."""
    config = state["buffer"]["config"]
    sampler = dict(config["sampler"])
    stacks = {config["frame_stack"][name] for name, shape in config["obs_shape"].items() if len(shape) == 3}
    settings = {
        **{name: config[name] for name in ("capacity", "num_envs", "n_step", "gamma")},
        "frame_stack": stacks.pop() if stacks else frame_stack,
        "sampler": f"{sampler.pop('kind')}({', '.join(f'{k}={v!r}' for k, v in sampler.items())})",
        "obs_keys": ", ".join(text((name,)) for name in config["obs_shape"]),
        "action_key": text(("action",)),
        "reward_key": text(("reward",)),
    }
    layout = {
        "obs": [
            _entry((name,), shape, config["obs_dtype"][name], name)
            for name, shape in config["obs_shape"].items()
        ],
        "action": _entry(("action",), config["action_shape"], config["action_dtype"], None),
        "reward": _entry(("next", "reward"), [1], "float32", None),
        "ends": [_entry(key, [1], "bool", None) for key in (DONE, TERMINATED, TRUNCATED)],
        "others": [_extra(tuple(key), config["extras"]) for key in state["extras"]],
        "nested": [],
        "earlier": True,
    }
    return {**state, "settings": settings, "layout": layout}


def read_pickle(attributes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the constructor's arguments, the state) of a pickled buffer."""
    arguments = {**attributes["_options"], "obs_keys": attributes["_obs_keys"]}
    arguments |= {name: attributes[name] for name in _OWN}
    buffer = attributes["_buffer"]
    return arguments, {
        "buffer": None if buffer is None else buffer.__getstate__(),
        "extras": attributes["_extras"],
        "streams": {
            "of": attributes["_stream_of"],
            "last_used": attributes["_last_used"],
            "clock": attributes["_clock"],
        },
    }


def _extra(key: Key, extras: dict[str, Any]) -> dict[str, Any]:
    name = "/" + "/".join(key)
    shape, dtype = extras[name]
    return _entry(key, shape, dtype, name)


def _entry(key: Key, shape: list[int], dtype: str, column: str | None) -> dict[str, Any]:
    return {"key": list(key), "shape": shape, "dtype": dtype, "column": column}
