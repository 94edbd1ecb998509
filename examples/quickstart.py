"""Streams an answer from a cluster, then asks for a few more at once.

python examples/quickstart.py [--address HOST:PORT ...] [--prompt TEXT]

With several addresses the stream goes on where it stood, should a gateway be lost in the middle of it.
"""

from __future__ import annotations

import argparse
import sys

from infinitellm import Client, Finished, InfiniteLLMError, Tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", nargs="+", default=["127.0.0.1:50051"], help="gRPC addresses of gateways")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--api-key")
    arguments = parser.parse_args()
    prompt = arguments.prompt
    try:
        with Client(arguments.address, api_key=arguments.api_key) as client:
            for event in client.generate(prompt, max_tokens=arguments.max_tokens):
                if isinstance(event, Tokens):
                    print(event.text, end="", flush=True)
                elif isinstance(event, Finished):
                    print(f"\n[{event.completion_tokens} tokens, {event.reason}]")
            answers = client.complete_batch([prompt] * 3, max_tokens=arguments.max_tokens, temperature=0.8)
            for number, answer in enumerate(answers, 1):
                print(f"{number}: {answer if isinstance(answer, InfiniteLLMError) else answer.text}")
    except InfiniteLLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
