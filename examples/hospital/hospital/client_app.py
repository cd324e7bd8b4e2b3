"""The site. What it trains is sealed by the site's own installation, whether the app asks for it or not."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from hospital.task import accuracy, load, new_model, shard_of, train

app = ClientApp()


@app.train()
def train_here(message: Message, context: Context) -> Message:
    shard, config = shard_of(context.node_config), context.run_config
    number = int(message.content["config"]["server-round"])
    model = new_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    x, y, _, _ = load(shard)
    # Another order in every round and at every site, and the same one when the round is repeated.
    train(model, x, y, epochs=config["local-epochs"], learning_rate=config["learning-rate"], seed=1000 * number + shard)
    metrics = MetricRecord({"num-examples": len(y)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate_here(message: Message, context: Context) -> Message:
    model = new_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    _, _, x, y = load(shard_of(context.node_config))
    metrics = MetricRecord({"num-examples": len(y), "accuracy": accuracy(model, x, y)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
