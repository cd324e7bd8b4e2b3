"""The coordinator. Updates are sealed: that is what ``QuorumStrategy`` does unless it is told otherwise."""

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from hospital.task import new_model
from quorsum.server import QuorumStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    strategy = QuorumStrategy(tolerate=config["tolerate"])
    strategy.start(grid, ArrayRecord(new_model().state_dict()), num_rounds=config["num-server-rounds"])
