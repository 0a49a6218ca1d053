"""The neutral torch tier: model runner, batch building, sampler. It reaches a device only through the contract."""
