"""``python -m services.gateway --config FILE``: runs one gateway until SIGTERM or SIGINT."""

from services.runtime.process import leave, loading

if __name__ == "__main__":
    with loading():
        from services.gateway.service import main
    leave(main())
