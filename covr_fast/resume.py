"""What may change when a run is resumed: a changed setting takes effect, or is refused before anything is
written."""

from pathlib import Path

from .checkpoint import Checkpoint, load_config
from .config import TrainConfig
from .errors import UserError
from .files import full_names, read_json, read_records

_TAKING_EFFECT = """
    steps device threads log_every video checkpoint_minutes checkpoint_every save_replay
    env.batch_size env.num_threads env.server env.entry_point env.action_names
    agent.lr agent.alpha_lr agent.target_entropy agent.tau agent.prior_weight agent.graph agent.compile
    agent.encoder_dtype replay.batch_size replay.device
    agent.encoder_tau agent.actor_every agent.target_every agent.shifts agent.shift_pad
    agent.std_start agent.std_end agent.std_decisions agent.std_clip
    vlm.attention vlm.dtype vlm.every vlm.between vlm.temperature vlm.background vlm.refresh_priors
    vlm.max_staleness vlm.graph
    tuner.learning_rate tuner.warmup tuner.weight_decay tuner.max_grad_norm tuner.epochs tuner.average
    tuner.max_steps tuner.batch_size tuner.micro_batch tuner.packing tuner.held_out tuner.label_smoothing
    tuner.shift tuner.gradient_checkpointing tuner.cache_image_features tuner.overlap
    covr.psi_0 covr.schedule covr.threshold covr.cold_start covr.min_samples covr.horizon covr.bootstrap
    covr.confidence covr.publish_after covr.trust_from covr.normalise covr.distance covr.entropy
    covr.decay covr.filter covr.top_share covr.z_score covr.score covr.weights replay.best_share
    eval.episodes eval.every eval.vlm eval.rounds
    """
MAY_CHANGE = frozenset(_TAKING_EFFECT.split())
"""Settings that may change. The new value takes effect from the checkpoint on."""

_WHY_FIXED = {
    "what is in the replay buffer came from such an environment": """
        env.id env.num_envs env.height env.width env.grayscale env.frame_stack env.action_repeat
        env.max_episode_steps env.seed""",
    "the replay buffer was made with it": "replay.capacity replay.n_step replay.gamma replay.sampler",
    "its optimizers began with it": "agent.alpha_beta agent.model_decay",
    "the agent's networks have that form": """
        agent.kind agent.channels agent.strides agent.latent agent.hidden agent.log_std_min agent.log_std_max
        replay.augment replay.pad""",
    "the agent has learnt with it": "agent.init_alpha agent.reward_scale",
    "updates so far were counted by it": "warmup decisions_per_update",
    "the run goes on with the VLM in its checkpoint, which was tuned with it": """
        vlm.model vlm.quantization vlm.prompt vlm.decimals vlm.image_size vlm.motion env.prompt
        tuner.mode tuner.lora_rank tuner.lora_alpha""",
    "it has set the run's randomness": "seed tuner.seed",
    "episodes before and after training would not be the same": "eval.seed",
    "what was trained so far was trained so": "covr.vlm covr.decides",
    "its settings began as that preset": "begun_as",
    "its settings began as that method": "method",
}
FIXED = {name: why for why, names in _WHY_FIXED.items() for name in names.split()}
"""Settings that may not change, and why."""


def open_resumed(run: Path, config: TrainConfig) -> Checkpoint:
    """The checkpoint from which the run continues with `config`.

    Raises:
        UserError: a setting that may not change was changed, there is no checkpoint, or nothing is left to
            do.
    """
    saved = Checkpoint(run)
    begun_with = saved.counters.get("settings")  # missing in checkpoints of the first version
    before = TrainConfig.from_dict(begun_with) if begun_with else load_config(run)
    _refuse_changes(before, config)
    for name in ("metrics.jsonl", "answers.jsonl", "evaluations.jsonl"):
        if (run / name).exists():
            read_records(run / name)  # raises for a damaged file, before anything is built
    done = saved.counters["step"]
    asked = config.steps if config.learns else 0  # a run that trains nothing takes no steps
    if config.steps < min(done, before.steps):
        raise UserError(
            f"steps={config.steps}, but {run} has made {done} steps: leave it out, or raise it above {done}"
        )
    if asked > done and not saved.has_replay():
        raise UserError(
            f"{run} cannot train on: its {done} steps are done, and it holds no replay buffer (--save-replay)"
        )
    if asked <= done and _finished_steps(run) >= done:
        remedy = (
            f"--steps above {done} trains on" if saved.has_replay() else "--save-replay lets a run train on"
        )
        raise UserError(f"{run} is finished: its {done} steps are done ({remedy})")
    return saved


def _refuse_changes(before: TrainConfig, asked: TrainConfig) -> None:
    had, now = full_names(before.to_dict()), full_names(asked.to_dict())
    refused = [name for name in now if name not in MAY_CHANGE and had[name] != now[name]]
    if not (before.begun_as and asked.begun_as):  # made by hand, or by an older version
        refused = [name for name in refused if name != "begun_as"]
    if not refused:
        return
    first = refused[0]
    others = f"; nor may {', '.join(refused[1:])} change" if refused[1:] else ""
    raise UserError(
        f"the run was begun with {first}={had[first]}: it cannot go on with {now[first]}, for "
        f"{FIXED[first]}{others} (leave out what is to stay, or begin a new run)"
    )


def _finished_steps(run: Path) -> int:
    """Steps in the summary.json of a finished run, or -1."""
    path = run / "summary.json"
    try:
        return int(read_json(path, "").get("steps", -1)) if path.is_file() else -1
    except UserError:
        return -1  # a damaged summary.json is written again
