"""The site. Without quorsum the marked line reads ``app = ClientApp()``."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quickstart.task import accuracy, load, new_model, train
from quorsum.client import seal  # <- one line more

app = ClientApp(mods=[seal()])  # <- one line changed


@app.train()
def train_here(message: Message, context: Context) -> Message:
    model = new_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    x, y, _, _ = load(context.node_config["partition-id"], context.node_config["num-partitions"])
    train(model, x, y)
    metrics = MetricRecord({"num-examples": len(y)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate_here(message: Message, context: Context) -> Message:
    model = new_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    _, _, x, y = load(context.node_config["partition-id"], context.node_config["num-partitions"])
    metrics = MetricRecord({"num-examples": len(y), "accuracy": accuracy(model, x, y)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
