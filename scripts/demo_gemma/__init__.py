"""How the demo pair is made: Gemma-4 model, assistant, training, export, figures."""

ASSISTANT_FOLDER = "assistant"
