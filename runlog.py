"""A run's folder: `config.json`, `eval.csv` and `train.csv`, flushed row by row; TensorBoard and W&B only if asked for.

What it claims: a run never overwrites another, and what was written is on disk when the next line of the program runs.

    log = RunLog("runs/walker-walk__seed=0", config={"seed": 0})
    log.write("eval", {"agent_step": 0, "frames": 0, "return": 31.5})
"""

import csv
import json
import os


class RunLog:
    """Makes the folder (FileExistsError, in one line, if it is there already) and writes into it.

    Every row of a table must have the columns of its first row. tensorboard: write event files into the folder as well.
    wandb_project: also send rows to Weights & Biases under that project. Both are imported only then.
    """

    def __init__(self, folder, config, tensorboard=False, wandb_project=None):
        self.tensorboard = _import("torch.utils.tensorboard", "tensorboard") if tensorboard else None
        self.wandb = _import("wandb", "wandb") if wandb_project else None
        try:
            os.makedirs(folder)
        except FileExistsError:
            raise FileExistsError(f"{folder} exists: a run never overwrites another; choose another --name, or move it "
                                  "away") from None
        self.folder, self.tables = folder, {}
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(config, file, indent=2)
            file.write("\n")
        if self.tensorboard:
            self.tensorboard = self.tensorboard.SummaryWriter(folder)
        if self.wandb:
            self.wandb.init(project=wandb_project, name=os.path.basename(folder), config=config, dir=folder)

    def write(self, table, row):
        """One row of `<table>.csv`; the first one sets the columns."""
        if table not in self.tables:
            file = open(os.path.join(self.folder, f"{table}.csv"), "w", newline="")
            self.tables[table] = file, csv.DictWriter(file, list(row))
            self.tables[table][1].writeheader()
        file, writer = self.tables[table]
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
        file.flush()
        if self.tensorboard:
            for name, value in row.items():
                self.tensorboard.add_scalar(f"{table}/{name}", value, row["agent_step"])
        if self.wandb:
            self.wandb.log({f"{table}/{name}": value for name, value in row.items()})

    def close(self):
        for file, _ in self.tables.values():
            file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def _import(module, package):
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise ImportError(f"{package} is not installed: pip install {package}, or leave its flag away") from None
