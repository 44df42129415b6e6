"""Contract tests and parts for testing: what a store, codec, tier or policy of yours must pass.

Subclass a contract and give it the thing under test::

    from ghostcacher.testing.store import StoreContract

    class TestMyStore(StoreContract):
        @pytest.fixture
        def store(self):
            return MyStore()
"""
