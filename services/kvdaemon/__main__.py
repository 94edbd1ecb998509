"""``python -m services.kvdaemon --config FILE``: runs one KV daemon until SIGTERM or SIGINT."""

from services.runtime.process import leave, loading

if __name__ == "__main__":
    with loading():
        from services.kvdaemon.service import main
    leave(main())
