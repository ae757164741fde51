import importlib.util
import shutil

import pytest

from data_loaders.prepare.engines import make_engine

MISSING = {
    "pyspark is not installed (pip install 'pyspark>=4,<4.1')": lambda: importlib.util.find_spec("pyspark") is None,
    "Java is not installed (apt install openjdk-17-jre-headless)": lambda: shutil.which("java") is None,
}
# For a few rows, compiling takes longer than anything else: that of queries, and the JVM's own of itself.
SPARK = {
    "spark.sql.shuffle.partitions": "3",
    "spark.default.parallelism": "3",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.sql.adaptive.enabled": "false",
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
}


def open_engine(name, work):
    """An engine with its intermediate tables in ``work``; skips where Spark cannot run."""
    if name == "spark":
        for reason, missing in MISSING.items():
            if missing():
                pytest.skip(f"engine=spark: {reason}")
    return make_engine(name, work, memory_limit="1GB", threads=2, options=SPARK if name == "spark" else {})


@pytest.fixture(scope="session")
def spark_session(tmp_path_factory):
    """One session for all tests: to start one takes seconds."""
    if any(missing() for missing in MISSING.values()):
        yield None
        return
    from pyspark.sql import SparkSession

    engine = open_engine("spark", tmp_path_factory.mktemp("spark"))
    yield engine.session
    SparkSession.getActiveSession().stop()


@pytest.fixture(params=["duckdb", "spark"])
def engine(request, tmp_path, spark_session):
    made = open_engine(request.param, tmp_path / "work")
    yield made
    if request.param == "duckdb":
        made.close()


@pytest.fixture
def duckdb_engine(tmp_path):
    made = open_engine("duckdb", tmp_path / "work")
    yield made
    made.close()
