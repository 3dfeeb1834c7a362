{{- /* Labels that rules, dashboard and autoscaling look for, whatever the release is called. */ -}}
{{- define "canvasrt.relabelings" -}}
- targetLabel: job
  replacement: canvasrt
- targetLabel: service
  replacement: {{ include "canvasrt.fullname" . }}
{{- end -}}

{{- define "canvasrt.scaleFaults" -}}
{{- $scaling := .Values.autoscaling -}}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) -}}
{{- fail (printf "autoscaling.minReplicas is %d and autoscaling.maxReplicas %d: the least can't be more than the most" (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
{{- end -}}
{{- if not (or $scaling.target.waitingRequests $scaling.target.slotUse) -}}
{{- fail "autoscaling.target.waitingRequests and autoscaling.target.slotUse are both null: keep one, or set autoscaling.enabled to false" -}}
{{- end -}}
{{- end -}}

{{- /* TCP ports of where the pipeline fetches from: a JSON list, empty for folders. */ -}}
{{- define "canvasrt.sourcePorts" -}}
{{- $ports := list -}}
{{- if ne .Values.pipeline.mode "none" -}}
{{- range $source := compact (list .Values.model.source .Values.model.bundleSource) -}}
{{- if hasPrefix "hf://" $source -}}
{{- $ports = append $ports 443 -}}
{{- else if hasPrefix "s3://" $source -}}
{{- $url := urlParse (default "https://s3" $.Values.model.s3.endpoint) -}}
{{- $ports = append $ports (include "canvasrt.portOf" (dict "host" $url.host "default" (ternary 80 443 (eq $url.scheme "http"))) | int) -}}
{{- else if hasPrefix "oci://" $source -}}
{{- $host := trimPrefix "oci://" $source | splitList "/" | first -}}
{{- $ports = append $ports (include "canvasrt.portOf" (dict "host" $host "default" (ternary 80 443 $.Values.model.oci.insecure)) | int) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- uniq $ports | toJson -}}
{{- end -}}

{{- /* Of HOST, HOST:PORT, [V6] or [V6]:PORT. */ -}}
{{- define "canvasrt.portOf" -}}
{{- $port := regexFind ":[0-9]+$" (regexReplaceAll "^\\[.*\\]" .host "") -}}
{{- default (toString .default) (trimPrefix ":" $port) -}}
{{- end -}}

{{- /* DNS, the values' own rules, and ports of remote sources; a dict with root and ports. */ -}}
{{- define "canvasrt.egress" -}}
{{- $rules := list -}}
{{- with .root.Values.networkPolicy.dns -}}
{{- $rules = append $rules (dict "to" . "ports" (list (dict "port" 53 "protocol" "UDP") (dict "port" 53 "protocol" "TCP"))) -}}
{{- end -}}
{{- if .ports -}}
{{- $tcp := list -}}
{{- range .ports }}{{ $tcp = append $tcp (dict "port" (int .) "protocol" "TCP") }}{{ end -}}
{{- $rules = append $rules (dict "ports" $tcp) -}}
{{- end -}}
{{- toYaml (concat $rules .root.Values.networkPolicy.egress) -}}
{{- end -}}
