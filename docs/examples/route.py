"""Routes questions between two served models: the small one answers, and the large one where it is not sure enough.

    python docs/examples/route.py http://127.0.0.1:8080 http://127.0.0.1:8081 0.93 < questions.txt

Both servers speak OpenAI's protocol, as those of llama.cpp and vLLM do. 0.93 is a threshold of `autodistill cascade`,
by answer. A line of the input is a question; each line of the output says who answered it, and how sure the small model
was: the geometric mean of the probabilities that it gave to the tokens that it wrote. Needs Python alone.
"""

import json
import math
import os
import sys
import urllib.request


def ask(server, question, **more):
    """Return the first choice of a server for a question: greedy, as the confidences of the curve are."""
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 256, **more}
    request = urllib.request.Request(f"{server}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    request.add_header("Authorization", f"Bearer {os.environ.get('API_KEY', '')}")
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]


def route(question, small, large, threshold):
    """Return the answer, who gave it, and the small model's confidence."""
    first = ask(small, question, logprobs=True)
    logs = [token["logprob"] for token in first["logprobs"]["content"]]
    confidence = math.exp(sum(logs) / len(logs)) if logs else 0.0
    if confidence >= threshold:
        return first["message"]["content"], "small", confidence
    return ask(large, question)["message"]["content"], "large", confidence


if __name__ == "__main__":
    for line in filter(None, map(str.strip, sys.stdin)):
        answer, who, sure = route(line, sys.argv[1], sys.argv[2], float(sys.argv[3]))
        print(f"{who} ({sure:.3f}): {answer!r}", flush=True)
