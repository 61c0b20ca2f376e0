import subprocess
import sys


def test_the_package_needs_numpy_alone():
    code = (
        "import sys, attamba.data\n"
        "heavy = {'torch', 'tokenizers', 'sentencepiece', 'pyarrow', 'fsspec', 'zstandard'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "tokenizer = attamba.data.load_tokenizer('bytes')\n"
        "assert tokenizer.decode(tokenizer.encode('é')) == 'é'\n"
        "assert not heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
