"""Makes the models that only the study takes, beside this file: python bench/study/models.py. About 40 minutes on two cores."""

import argparse
from pathlib import Path

from tts_engine.embedded.train import train_study

STUDY_MODELS = Path(__file__).parent / "models"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=STUDY_MODELS, metavar="DIR", help="for the models (default %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/study"), metavar="DIR", help="for logs (default %(default)s)")
    args = parser.parse_args()
    train_study(args.out, args.work)
