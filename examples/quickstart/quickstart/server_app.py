"""The coordinator. Without quorsum the marked lines read ``FedAvg``."""

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from quickstart.task import new_model
from quorsum.server import QuorumStrategy  # <- was: from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    strategy = QuorumStrategy(rule=config["rule"], tolerate=config["tolerate"])  # <- was: strategy = FedAvg()
    strategy.start(grid, ArrayRecord(new_model().state_dict()), num_rounds=config["rounds"])
