"""``python -m services.gmanager --config FILE``: runs one gManager until SIGTERM or SIGINT."""

from services.runtime.process import leave, loading

if __name__ == "__main__":
    with loading():
        from services.gmanager.service import main
    leave(main())
