"""What credit by turn changes in TRL's GRPOTrainer: the same trainer, seeds and personas, with and without it.

    python scripts/trl_credit.py [--domain chatting] [--seeds 10] [--steps 8]

Trains the embedded model by the settings of `examples/trl_grpo.py`, once per seed and way of credit: TRL's own (one
advantage per conversation) and `PartialCreditTrainer` with a policy class. Then plays held-out personas, the same for
all, and prints the mean judged reward over seeds and the difference to the first way, paired by seed, with 95%
t-intervals.
Every trained model is one line on stderr, as soon as it is there.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.resources import files
from tempfile import TemporaryDirectory

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is marked as experimental

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig
from scipy.stats import t as student
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from ppg_agents.intervals import FEWEST_SEEDS
from ppg_agents.trl import PersonaChat
from ppg_agents.trl.credit import PartialCreditTrainer

EVALUATED, MEMBERS = 16, 8  # held-out conversations: so many seeds, each played so often
WAYS = {"TRL's own": None, **{name: {"policy_class": name} for name in ("greedy", "2-step", "3-step", "full")}}


def score(way: str, seed: int, domain: str, steps: int, turns: int) -> float:
    """Train once and return the mean judged reward of held-out conversations."""
    chat = PersonaChat(domain=domain, max_turns=turns, on_judge_failure="nan")
    options = WAYS[way]
    with TemporaryDirectory() as out:
        trainer = (GRPOTrainer if options is None else PartialCreditTrainer)(
            model=str(files("ppg_agents.models") / "tiny"),
            args=GRPOConfig(
                output_dir=out,
                seed=seed,
                max_steps=steps,
                per_device_train_batch_size=32,
                per_device_eval_batch_size=EVALUATED * MEMBERS,
                num_generations=MEMBERS,
                max_completion_length=48,
                learning_rate=5e-3,
                lr_scheduler_type="constant",
                use_cpu=not torch.cuda.is_available(),
                bf16=torch.cuda.is_available(),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
            ),
            train_dataset=chat.dataset(512, seed=100_000 * (seed + 1)),
            rollout_func=chat.rollout,
            reward_funcs=chat.reward,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            **(options or {}),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.evaluate(chat.dataset(EVALUATED, seed=7, personas="held-out"))
    judged = [reward for one in chat.trajectories for reward in one.judged()]
    chat.close()
    return sum(judged) / len(judged)


def interval(values: Sequence[float] | NDArray[np.float64], sign: str = "") -> str:
    """Return the mean of one value per seed, with its 95% t-interval; ``+`` shows the sign of differences."""
    mean, n = float(np.mean(values)), len(values)
    if n < FEWEST_SEEDS:
        return f"{mean:{sign}.3f} (too few seeds to say)"
    half = float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return f"{mean:{sign}.3f} [{mean - half:{sign}.3f}, {mean + half:{sign}.3f}]"


def main() -> None:
    """Train, evaluate and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", default="chatting")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=8, help="of 32 conversations")
    parser.add_argument("--turns", type=int, default=4, help="of a conversation")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    given = parser.parse_args()
    found: dict[str, list[float]] = {way: [] for way in given.ways}
    for seed in range(given.seeds):
        for way in given.ways:
            found[way].append(score(way, seed, given.domain, given.steps, given.turns))
            print(f"{given.domain}, seed {seed}, {way}: {found[way][-1]:.3f}", file=sys.stderr, flush=True)
    print("| credit | held-out reward [95%, t over seeds] | difference to the first |\n|---|---|---|")
    first = np.array(found[given.ways[0]])
    for way, values in found.items():
        difference = "" if way == given.ways[0] else interval(np.array(values) - first, "+")
        print(f"| {way} | {interval(values)} | {difference} |")


if __name__ == "__main__":
    main()
