{{- define "elasticmoe.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "elasticmoe.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "elasticmoe.labels" -}}
{{ include "elasticmoe.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | quote }}
{{- end -}}

{{- define "elasticmoe.adminSecret" -}}
{{- .Values.adminToken.existingSecret | default (printf "%s-admin" (include "elasticmoe.fullname" .)) -}}
{{- end -}}

{{/* What every container is and may not. */}}
{{- define "elasticmoe.container" -}}
image: "{{ .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end }}"
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end -}}

{{/* The settings of every process. A name that no process knows stops its start. */}}
{{- define "elasticmoe.settings" -}}
- {name: ELASTICMOE_MODEL, value: /models/model}
{{- if not (hasKey .Values.settings "deployment") }}
- {name: ELASTICMOE_DEPLOYMENT, value: {{ printf "%s.%s" .Release.Namespace .Release.Name | trunc 64 | quote }}}
{{- end }}
{{- range $name, $value := .Values.settings }}
- name: ELASTICMOE_{{ upper $name }}
  value: {{ if kindIs "float64" $value }}{{ if eq $value (floor $value) }}{{ printf "%.0f" $value | quote }}{{ else }}{{ $value | toString | quote }}{{ end }}{{ else }}{{ $value | toString | quote }}{{ end }}
{{- end }}
{{- end -}}

{{/* Mounts: a dict with `root` and the `parts` of the two volumes, as a list of [volume, part, path, readOnly]. */}}
{{- define "elasticmoe.mounts" -}}
{{- range . }}
- name: {{ index . 0 }}
  subPath: {{ index . 1 }}
  mountPath: {{ index . 2 }}
  {{- if gt (len .) 3 }}
  readOnly: true
  {{- end }}
{{- end }}
{{- end -}}

{{- define "elasticmoe.model" -}}
- name: model
  mountPath: /models/model
  readOnly: true
  {{- with .Values.model.subPath }}
  subPath: {{ . | quote }}
  {{- end }}
{{- end -}}

{{/* Where layouts are kept, for the two that ask there: an address with a password stays in its Secret. */}}
{{- define "elasticmoe.store" -}}
{{- with .Values.store.existingSecret -}}
- name: ELASTICMOE_STORE_URL
  valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: {{ $.Values.store.key | quote }}}}
{{- end -}}
{{- end -}}

{{/* A process answers: `elasticmoe.cli.container check NAME`. Whoever ends is started again, so none is asked later: a check
that finds no processor time would end who holds the weights. */}}
{{- define "elasticmoe.starts" -}}
startupProbe:
  exec: {command: [python, -m, elasticmoe.cli.container, check, {{ . }}]}
  periodSeconds: 5
  timeoutSeconds: 10
  failureThreshold: 60
{{- end -}}

{{/* Lives on while the router ends running requests. */}}
{{- define "elasticmoe.outlives" -}}
lifecycle:
  preStop:
    exec: {command: [sleep, {{ add .Values.drainSeconds 5 | quote }}]}
{{- end -}}
