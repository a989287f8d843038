process GENOMAMBA_CLASSIFY {
    tag "$meta.id"
    label 'process_medium'

    conda "${moduleDir}/environment.yml"
    container "genomamba:0.1.0"

    input:
    tuple val(meta), path(sequences)
    path  model
    val   shipped_model

    output:
    tuple val(meta), path("*.calls.tsv"), emit: calls
    tuple val(meta), path("*.kreport")  , emit: kraken_report
    tuple val(meta), path("*.biom")     , emit: biom
    tuple val(meta), path("*_mqc.tsv")  , emit: multiqc
    tuple val("${task.process}"), val('genomamba'), eval('genomamba --version | sed -n "s/^genomamba //p"'), topic: versions, emit: versions_genomamba

    when:
    task.ext.when == null || task.ext.when

    script:
    def args   = task.ext.args ?: ''
    def prefix = task.ext.prefix ?: "${meta.id}"
    def paired = meta.single_end == false ? '--paired' : ''
    def chosen = model ?: shipped_model
    """
    genomamba classify \\
        $chosen \\
        $sequences \\
        $paired \\
        $args \\
        --threads $task.cpus \\
        --quiet \\
        --output ${prefix}.calls.tsv \\
        --kraken-report ${prefix}.kreport \\
        --biom ${prefix}.biom \\
        --multiqc ${prefix}_mqc.tsv
    """

    stub:
    def prefix = task.ext.prefix ?: "${meta.id}"
    """
    touch ${prefix}.calls.tsv ${prefix}.kreport ${prefix}.biom ${prefix}_mqc.tsv
    """
}
