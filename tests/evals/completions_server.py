"""A small OpenAI-compatible server with a real tiny model, as vLLM answers: prompts as token ids, echo, logprobs.

Run as a module: folder of the model, port; prints `ready`.
"""

import sys

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from transformers import AutoModelForCausalLM, AutoTokenizer

import hub_moe.modeling  # noqa: F401  (registers hub_moe)


class Served:
    """The model, and what it has been asked."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def describe(self, tokens):
        """vLLM's `logprobs` of an echoed prompt and one more greedy token, of which lm_eval drops the last."""
        tokens = [*tokens, int(self.model(torch.tensor([tokens])).logits[0, -1].argmax())]
        scores = self.model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
        chosen = [None, *(float(scores[place, token]) for place, token in enumerate(tokens[1:]))]
        best = [None]
        for place, token in enumerate(tokens[1:]):
            top = int(scores[place].argmax())
            best.append({f"{top}": float(scores[place, top]), f"{token}": chosen[place + 1]})
        return {"token_logprobs": chosen, "top_logprobs": best, "tokens": [str(token) for token in tokens]}

    @torch.no_grad()
    def generate(self, tokens, body):
        """Greedy text, cut at a stop."""
        out = self.model.generate(
            torch.tensor([tokens]), max_new_tokens=int(body.get("max_tokens") or 16), do_sample=False, pad_token_id=1
        )
        text = self.tokenizer.decode(out[0, len(tokens) :], skip_special_tokens=True)
        for stop in body.get("stop") or []:
            text = text.split(stop)[0]
        return text

    def encode(self, prompt):
        return self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt


def make_app(served):
    async def complete(request):
        body = await request.json()
        if body["model"] != "tiny":
            return JSONResponse({"error": {"message": f"The model {body['model']} does not exist."}}, status_code=404)
        prompts = body["prompt"]
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        choices = []
        for index, prompt in enumerate(prompts):
            tokens = served.encode(prompt)
            if body.get("echo"):
                choices.append({"index": index, "text": "", "logprobs": served.describe(tokens)})
            else:
                choices.append({"index": index, "text": served.generate(tokens, body)})
        return JSONResponse({"choices": choices})

    async def chat(request):
        body = await request.json()
        prompt = "".join(message["content"] for message in body["messages"])
        text = served.generate(served.encode(prompt), body)
        return JSONResponse({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]})

    async def fail(_):
        return JSONResponse({"error": {"message": "out of memory"}}, status_code=500)

    return Starlette(
        routes=[
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/broken/completions", fail, methods=["POST"]),
        ]
    )


if __name__ == "__main__":
    app = make_app(Served(sys.argv[1]))
    print("ready", flush=True)
    uvicorn.run(app, port=int(sys.argv[2]), log_level="error")
