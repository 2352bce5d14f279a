"""Names of the files in a run's folder that several parts of the package write, read or look for."""

CARD_NAME = "README.md"  # the model card
RUN_CONFIG_NAME = "run.yaml"
RUN_STATE_NAME = "run_state.json"  # in a checkpoint
BASE_FINGERPRINT_NAME = "base_fingerprint.json"  # beside an adapter: of the weights that it was trained on
SUMMARY_NAME, CURVES_NAME = "training_summary.json", "training_curves.png"
SCORES_NAME, PREDICTIONS_NAME = "classification_summary.json", "predictions.jsonl"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
)  # any of them
CHAT_TEMPLATE_NAME = "chat_template.jinja"
